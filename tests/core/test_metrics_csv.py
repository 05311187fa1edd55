"""metrics.csv of older runs is read under the names of today."""

from genai.core import metrics_csv


def test_a_log_key_of_an_older_run_is_read_under_its_name_of_today(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(metrics_csv.HEAD + "5,train/deceit,0.5\n5,val/deceit,0.25\n5,train/error,1.0\n")
    found = {row.name: row.value for row in metrics_csv.rows(path)}
    assert found == {"train/adversarial_loss": 0.5, "val/adversarial_loss": 0.25, "train/error": 1.0}
