"""What everything runs on: compiled programs, host buffers, work that is finished before exit, and traces."""
