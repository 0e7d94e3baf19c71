"""What everything runs on: compiled programs, host buffers, work to finish before exit, traces, and late imports."""
