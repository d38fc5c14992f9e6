"""What is asked of the computer: devices, graphs, processes, profiles, files."""
