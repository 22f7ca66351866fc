"""Built-in tasks, and loading tasks from files and the hub."""
