"""Entry points: one script, one Ray job, one MLflow run each."""
