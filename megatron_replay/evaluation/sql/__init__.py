"""SQL questions: reading the published sets, and running generated queries under bounds."""
