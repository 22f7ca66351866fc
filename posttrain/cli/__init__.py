"""Command-line interface: commands, tables, reports."""
