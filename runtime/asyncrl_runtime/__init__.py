"""The processes of a job: engine, worker, trainer."""
