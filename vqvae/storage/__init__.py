"""What lies on disk: run folders, records of images and codes, and their labels."""
