// Package tracing sends OpenTelemetry spans to a collector by OTLP over HTTP.
//
// The packages that make spans know only OpenTelemetry's API and are handed a
// tracer; without one they make none. This package, which the program wires, is
// the only one that knows the SDK. It changes nothing global.
package tracing
