"""The machine: devices, memory, disk, progress, and what a name refers to on it."""
