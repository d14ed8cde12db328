"""The machine: devices, memory, disk, progress."""
