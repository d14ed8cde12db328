// First of all scripts: what fails is counted, for the tests and for a reader's console.
window.failures = [];
addEventListener("error", event => failures.push(String(event.message)));
addEventListener("unhandledrejection", event => failures.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => failures.push("blocked: " + event.blockedURI));
