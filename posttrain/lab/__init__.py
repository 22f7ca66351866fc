"""The lab: a local web application that shows what run folders hold. It trains nothing and writes to no run."""
