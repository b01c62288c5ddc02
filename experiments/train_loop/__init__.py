"""What surrounds the steps of a training run: reports, progress, stopping, replay."""
