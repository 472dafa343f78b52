//! `locum bench` measures all that it says.

mod common;

use common::locum;
use serde_json::Value;

#[test]
fn every_loss_is_measured() {
    let out = locum(&["bench", "--json", "--rounds", "1", "--calls", "50", "--kills", "3"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    for row in ["recovery_ms", "total_loss_ms", "total_loss_without_journal_ms", "reattach_ms"] {
        let (median, longest) = (report[row]["median"].as_f64(), report[row]["max"].as_f64());
        assert!(report[row]["kills"] == 3 && median > Some(0.0) && longest >= median, "{row}: {report}");
    }
    for part in ["caller_found", "caller_held"] {
        assert!(report["ask_again_us"][part]["p50"].as_f64() > Some(0.0), "{part}: {report}");
    }
}
