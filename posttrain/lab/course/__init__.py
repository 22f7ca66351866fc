"""The course: six chapters in Markdown, each in three layers, with numbers that the library computes when it is read."""
