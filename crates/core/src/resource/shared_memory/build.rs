//! Whether a segment was made by a build that lays everything out as this one does.

use crate::error::{Error, Result};

/// What the header of each segment of a kind begins with.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// What an error calls the segment.
    pub what: &'static str,
    /// Its first bytes.
    pub magic: [u8; 8],
    /// Changes when a field moves or changes its meaning.
    pub layout_version: u32,
    /// [`abi_hash`] of what two builds could disagree about without noticing.
    pub abi_hash: u64,
}

impl Build {
    /// Refuse what another program or another build wrote.
    pub fn expect(&self, magic: [u8; 8], layout_version: u32, abi_hash: u64) -> Result<()> {
        let what = self.what;
        if magic != self.magic {
            return Err(Error::corrupted(format!(
                "{what}: must begin with {}, found {}",
                self.magic.escape_ascii(),
                magic.escape_ascii()
            )));
        }
        if layout_version != self.layout_version {
            return Err(Error::unsupported(format!(
                "{what}: has layout version {layout_version}, this build of Moirai knows version \
                 {}; use the same version of Moirai on both sides",
                self.layout_version
            )));
        }
        if abi_hash != self.abi_hash {
            return Err(Error::unsupported(format!(
                "{what}: its creator was built differently: ABI hash {abi_hash:016x}, here \
                 {:016x}; use the same build of Moirai on both sides",
                self.abi_hash
            )));
        }
        Ok(())
    }
}

/// FNV-1a over sizes and places.
pub fn abi_hash(facts: &[usize]) -> u64 {
    facts
        .iter()
        .flat_map(|fact| (*fact as u64).to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}
