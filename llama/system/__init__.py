"""What a process is given: the launcher's variables, other processes, streams, files, arguments."""
