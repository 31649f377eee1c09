"""What every test may use: the API server without nodes, and the cluster."""

pytest_plugins = ["octavo_cluster.fixtures"]
