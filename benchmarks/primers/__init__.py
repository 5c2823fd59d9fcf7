"""Pictures of docs/damping.md and docs/step.md, measured on small networks: ``python -m benchmarks.primers``."""
