//! Files of `/proc` and `/sys` that stay open between two readings, and their words and numbers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// A file that is opened once and read from its beginning each time.
pub(super) struct Kept {
    path: PathBuf,
    file: Option<File>,
}

/// Where files are read to; grown to the largest.
pub(super) struct Page(Vec<u8>);

impl Page {
    pub(super) fn new() -> Self {
        Page(vec![0; 8192])
    }
}

impl Kept {
    pub(super) fn new(path: PathBuf) -> Self {
        Kept { path, file: None }
    }

    /// The content now, or `None` if there is no such file. A missing file is looked for again only
    /// with `reopen`, since the search costs more than a reading.
    pub(super) fn read<'a>(&mut self, page: &'a mut Page, reopen: bool) -> Option<&'a [u8]> {
        if self.file.is_none() && reopen {
            self.file = File::open(&self.path).ok();
        }
        let file = self.file.as_ref()?;
        loop {
            match file.read_at(&mut page.0, 0) {
                Ok(count) if count == page.0.len() => page.0.resize(2 * count, 0),
                Ok(count) => return Some(&page.0[..count]),
                Err(_) => {
                    // The group or the process is gone; another may come in its place.
                    self.file = None;
                    return None;
                }
            }
        }
    }

    /// The number that the file begins with; `None` also for the word `max`.
    pub(super) fn number(&mut self, page: &mut Page, reopen: bool) -> Option<u64> {
        number(self.read(page, reopen)?)
    }
}

/// The number at the beginning of `text`, after blanks.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii_start();
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[..digits]).ok()?.parse().ok()
}

/// The words of a text.
pub(super) fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

/// The numbers behind `names` at the beginning of lines, such as `file 4096` or `Pss:  12 kB`.
pub(super) fn fields<const N: usize>(text: &[u8], names: [&[u8]; N]) -> [Option<u64>; N] {
    let mut found = [None; N];
    let mut missing = N;
    for line in text.split(|byte| *byte == b'\n') {
        for (name, place) in names.iter().zip(&mut found) {
            if place.is_none()
                && let Some(rest) = line.strip_prefix(*name)
                && let Some(b' ' | b'\t') = rest.first()
            {
                *place = number(rest);
                missing -= usize::from(place.is_some());
            }
        }
        if missing == 0 {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_whole_names_at_the_beginning_of_lines() {
        let text = b"file 1\nactive_file 22\ninactive_file 333\n";
        assert_eq!(fields(text, [b"file"]), [Some(1)]);
        assert_eq!(fields(text, [b"inactive_file", b"anon"]), [Some(333), None]);
        assert_eq!(fields(b"Pss:      12 kB\n", [b"Pss:"]), [Some(12)]);
    }

    #[test]
    fn max_is_no_number() {
        assert_eq!(number(b"max\n"), None);
        assert_eq!(number(b" 17\n"), Some(17));
    }
}
