"""The course: six Markdown chapters in three layers each, with numbers that are computed when a page loads."""
