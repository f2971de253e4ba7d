"""Bridges to other libraries; each module is imported by whoever needs it, never by sparton itself."""
