"""Where records come from: files of many formats, checked, converted, mixed and cached."""
