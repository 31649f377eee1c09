"""A Kubernetes cluster for Octavo's demo and tests, on any machine: one interface, two ways to make it.

Where Docker answers the cluster is kind's; elsewhere (Linux, root) it is built from the components themselves. Nothing
in here knows what Octavo does: it brings up a cluster, builds images from Dockerfiles, and loads them. Only demo.py and
the fixtures know the product.
"""
