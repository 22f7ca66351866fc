"""The lab: a local web application that shows the contents of run folders. It never writes to a run."""
