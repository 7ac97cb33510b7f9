"""What the examples' manifests name as their model, data and reward. Shipped, so that a pod finds it too."""
