"""What a GPU needs besides what every device has: graphs, sampling without a look by the host, steps ahead of plans."""
