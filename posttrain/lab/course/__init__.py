"""The course: six chapters in Markdown, in three layers each, with numbers that are computed while they are read."""
