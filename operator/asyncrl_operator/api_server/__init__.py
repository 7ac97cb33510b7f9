"""What the operator knows about a cluster and does to it; only this folder talks to the API server."""
