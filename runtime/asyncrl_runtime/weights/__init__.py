"""Weight epochs: one process group of trainer rank 0 and the engines that are alive and willing."""
