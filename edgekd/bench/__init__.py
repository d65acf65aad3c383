"""Accuracy, latency, memory: what an artefact is worth on this machine, as one `result.json`."""
