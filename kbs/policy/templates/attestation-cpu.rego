# Attestation policy of the CPU: set it as attestation/ID_cpu.
#
# Reference values, each a list of hex texts: mr_td, mr_seam, rtmr_0, rtmr_1, rtmr_2, xfam. A claim
# whose values are not in force contradicts.
#
# input: the evidence of the submodule, as a token has it.
package policy

import rego.v1

trust_claims := {
	"configuration": configuration,
	"executables": executables,
	"hardware": hardware,
}

body := input.tdx.quote.body

good(name) if body[name] in query_reference_value(name)

# AR4SI: 2 affirms, 97 contradicts.
default hardware := 97

hardware := 2 if {
	input.tdx.tcb_status == "UpToDate"
	good("mr_seam")
	good("mr_td")
}

default configuration := 97

configuration := 2 if {
	input.tdx.td_attributes.debug == false
	good("xfam")
	good("rtmr_0")
}

default executables := 97

executables := 2 if {
	good("rtmr_1")
	good("rtmr_2")
}
