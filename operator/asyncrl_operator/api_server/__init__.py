"""What the operator knows of a cluster and does to it: the one folder that talks to the API server."""
