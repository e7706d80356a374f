"""A process's surroundings: the launcher's variables, other processes, streams, files, arguments."""
