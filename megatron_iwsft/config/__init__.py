"""The run configuration: schema, YAML loader, and text about the schema."""
