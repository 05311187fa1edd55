"""What is counted of models: functions of arrays that know no model."""
