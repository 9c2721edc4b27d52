//! Which Python this is for: whether it has an interpreter lock, above all.

fn main() {
    pyo3_build_config::use_pyo3_cfgs();
}
