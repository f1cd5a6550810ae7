"""One renderer per file: terminal, HTML, pictures. Reads the schema, computes nothing."""
