"""Sources whose files hold many images each; a format is a subclass of `FilesSource`."""
