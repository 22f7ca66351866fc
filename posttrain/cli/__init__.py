"""The command line: commands, tables, reports."""
