"""Control planes, nodes, clusters in memory, the operator as a process, and jobs on them."""
