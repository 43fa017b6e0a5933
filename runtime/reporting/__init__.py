"""Reports for people: tables of text, and pages of HTML with figures."""
