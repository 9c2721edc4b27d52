//! A class that is a snapshot of counts: each by name, all of them as a dict, and its text.

/// The methods of a class over a struct of counts, from the names of those.
macro_rules! counts {
    ($class:ident; $($(#[$doc:meta])* $field:ident),* $(,)?) => {
        #[pymethods]
        impl $class {
            $($(#[$doc])* #[getter] fn $field(&self) -> u64 { self.0.$field })*

            /// Every count by name.
            fn as_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                let dict = PyDict::new(py);
                $(dict.set_item(stringify!($field), self.0.$field)?;)*
                Ok(dict)
            }

            fn __repr__(&self) -> String {
                let fields = [$(format!("{}={}", stringify!($field), self.0.$field)),*];
                format!("{}({})", stringify!($class), fields.join(", "))
            }
        }
    };
}

pub(crate) use counts;
