"""On-disk formats: run folders, image and code records, and labels."""
