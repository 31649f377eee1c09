"""The InferenceService resource: its types (v1alpha1.py) and the CRD made from them (crd.py)."""
