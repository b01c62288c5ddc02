"""What keeps a long run alive: checkpoints and their manifests, processes, the watchdog, planted
faults."""
