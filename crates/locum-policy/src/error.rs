//! Errors that point at the place in the file.

use std::fmt;
use std::ops::Range;

/// What is wrong with a policy file, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct PolicyError {
    /// The file, as it was named to the reader.
    pub file: String,
    /// Counted from 1.
    pub line: usize,
    /// In characters, counted from 1.
    pub column: usize,
    /// What was wanted, what was found, what to do.
    pub message: String,
    excerpt: String,
    width: usize,
}

impl PolicyError {
    pub(crate) fn at(file: &str, text: &str, span: Range<usize>, message: String) -> Self {
        let start = (0..=span.start.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let excerpt = text[line_start..].lines().next().unwrap_or("").to_owned();
        let column = text[line_start..start].chars().count() + 1;
        let marked = text.get(start..span.end.min(text.len())).unwrap_or("");
        Self {
            file: file.to_owned(),
            line: text[..start].matches('\n').count() + 1,
            column,
            message,
            excerpt,
            width: marked.lines().next().map_or(1, |line| line.chars().count().max(1)),
        }
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.line.to_string();
        let (margin, indent) = (" ".repeat(number.len()), " ".repeat(self.column - 1));
        writeln!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)?;
        writeln!(f, "{margin} |")?;
        writeln!(f, "{number} | {}", self.excerpt)?;
        write!(f, "{margin} | {indent}{}", "^".repeat(self.width))
    }
}
