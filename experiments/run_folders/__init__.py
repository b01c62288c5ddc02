"""Run folders: the folder, what identifies a run, stored runs as commands read them, results."""
