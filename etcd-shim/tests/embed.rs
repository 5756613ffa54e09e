//! The example of the documentation runs, as an embedder would run it.

#![allow(clippy::unwrap_used)]

use std::process::Command;

#[test]
fn the_embedding_example_runs() {
    // Examples are built beside this test's own directory.
    let this = std::env::current_exe().unwrap();
    let example = this.parent().unwrap().parent().unwrap().join("examples").join("embed");
    let scratch = tempfile::tempdir().unwrap();
    let output = Command::new(example).arg(scratch.path().join("data")).current_dir(scratch.path()).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    assert!(printed.trim_end().ends_with("stopped"), "{printed}");
}
