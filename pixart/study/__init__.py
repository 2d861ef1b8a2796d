"""Runs side by side: tables and curves. It reads what runs wrote; nothing that trains or samples may enter it."""
