"""The HTTP side of the API process: FastAPI routes over one Service. Torch-free."""
