package tracing

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	for _, tc := range []struct {
		endpoint string
		sample   float64
		want     string // in the error; "" for none
	}{
		{"http://127.0.0.1:4318", 1, ""},
		{"https://collector.example/otlp/v1/traces", 0, ""},
		{"127.0.0.1:4318", 1, "trace_endpoint"},
		{"ftp://x", 1, "trace_endpoint"},
		{"http://", 1, "trace_endpoint"},
		{"http://x?token=hunter2", 1, "trace_endpoint"},
		{"http://me:hunter2@x", 1, "OTEL_EXPORTER_OTLP_HEADERS"},
		{"http://x\x7f", 1, "trace_endpoint"},
		{"http://x", -0.1, "trace_sample"},
		{"http://x", 1.1, "trace_sample"},
	} {
		err := Check(tc.endpoint, tc.sample)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q, %v: %v, expected %q", tc.endpoint, tc.sample, err, tc.want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v shows the secret", err)
		}
	}
}
