package server

import (
	"slices"
	"strings"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
)

// queries are the query parameters of the routes that have some, as in openapi.json.
var queries = map[string][]string{
	"GET /jobs/:job/steps":                      {"after", "limit"},
	"GET /jobs/:job/metrics":                    {"after", "limit"},
	"GET /jobs/:job/checkpoints/latest":         {"after", "wait"},
	"GET /jobs/:job/checkpoints/:step/files/*":  {"redirect"},
	"HEAD /jobs/:job/checkpoints/:step/files/*": {"redirect"},
	"GET /jobs/:job/checkpoints/:step/delta":    {"from"},
}

// knownQuery refuses a parameter that a route does not have: one that is mistyped would
// be ignored. Values are not repeated, for a secret may be among them.
func knownQuery(route string) echo.MiddlewareFunc {
	known := queries[route]
	expected := "no query"
	if known != nil {
		expected = "one of " + strings.Join(known, ", ")
	}
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			if c.Request().URL.RawQuery == "" {
				return next(c)
			}
			for name, values := range c.QueryParams() {
				if !slices.Contains(known, name) {
					return fault.BadField(name[:min(len(name), 64)], "an unknown query parameter", expected)
				}
				if len(values) != 1 {
					return fault.BadField(name, "it more than once", "it once")
				}
			}
			return next(c)
		}
	}
}
